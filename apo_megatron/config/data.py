"""Settings of training data: where prompts come from, and which columns are what."""

from __future__ import annotations

from pathlib import PurePath

from pydantic import Field

from apo_megatron.config.section import FrozenList, FrozenMapping, PositiveFloat, PositiveInt, Section, rule


class PromptFormat(Section):
    """How the rows of a data set become prompts (docs/data.md)."""

    subset: str | None = Field(None, description="Subset of a hub id or directory (hub: configuration).")
    split: str | None = Field(None, description="Split of a hub id or directory; null = train.")
    prompt_field: str = Field(
        "prompt",
        description="Column with the prompt: text, or a list of chat messages. Dots lead into objects.",
    )
    id_field: str | None = Field(
        None, description="Column with the prompt's id; null = id, or the row number."
    )
    fields: FrozenMapping = Field(
        (), description="Columns under another name: what the reward reads -> column (answer: a.b)."
    )
    chat_template: bool = Field(
        False, description="Apply the tokenizer's chat template; false: text as it is, no BOS."
    )


class PromptDataset(PromptFormat):
    """A data set of problems."""

    path: str = Field(description="JSONL or Parquet file, local directory, or hub id.")


class DataSource(PromptDataset):
    """One of several data sets."""

    name: str | None = Field(
        None, description="What its prompt ids begin with; null = the last part of path, without suffix."
    )
    weight: PositiveFloat = Field(1.0, description="Share of the prompts drawn, relative to the others.")

    @property
    def label(self) -> str:
        """``name``, or what the path gives for it."""
        return self.name if self.name is not None else PurePath(self.path).stem


class DataConfig(PromptFormat):
    """Training prompts: one data set, or a mixture of several."""

    train_path: str | None = Field(
        None, description="JSONL or Parquet file, local directory, or hub id; a problem a row."
    )
    sources: FrozenList[DataSource] = Field(
        (), description="Instead of train_path: several data sets, drawn from by weight."
    )
    prompts_per_step: PositiveInt = Field(64, description="Prompts of one step, over all ranks.")
    max_prompt_length: PositiveInt = Field(1024, description="Longer prompts (tokens) are left out, counted.")
    shuffle: bool = Field(True, description="Shuffle every epoch, from train.seed.")

    @rule
    def prompts_come_from_one_place(self) -> str | None:
        """Either `train_path` or `sources` must be given, not both."""
        if (self.train_path is None) == (not self.sources):
            found = "neither is given" if self.train_path is None else "both are given"
            return f"train_path and sources: {found}; name one data set as train_path, or several as sources"
        return None

    @rule
    def sources_have_formats_of_their_own(self) -> str | None:
        """With `sources`, the fields that describe a data set (`prompt_field`, `fields`, ...) belong into
        each of them."""
        ignored = [
            name for name, info in PromptFormat.model_fields.items() if getattr(self, name) != info.default
        ]
        if self.sources and ignored:
            return f"{', '.join(ignored)} beside sources would be ignored: write it into each of the sources"
        return None

    @rule
    def source_names_are_different(self) -> str | None:
        """`sources` must have different names: prompt ids begin with them."""
        labels = [source.label for source in self.sources]
        if len(set(labels)) < len(labels):
            return f"sources have the names {labels}, which must differ: give each a name"
        return None


class SupervisedDataConfig(Section):
    """Demonstrations: JSONL with a prompt and a response column."""

    train_path: str = Field(description="JSONL file with one demonstration a line.")
    prompt_field: str = Field(
        "prompt", description="Column with the prompt text, tokenised as it is: no BOS, no chat template."
    )
    response_field: str = Field("response", description="Column with the response text (EOS is added).")
    max_length: PositiveInt = Field(2048, description="Longer examples (tokens) are left out, counted.")
    shuffle: bool = Field(True, description="Shuffle every epoch, from train.seed.")


class PrepareConfig(Section):
    """``python -m tools.prepare_data``."""

    source: PromptDataset
    against: FrozenList[PromptDataset] = Field(
        (), description="Evaluation sets: rows that share words in a row with one are removed."
    )
    ngram: PositiveInt = Field(13, description="So many words in a row are an overlap.")
    tokenizer: str | None = Field(
        None, description="Directory or hub id of the tokenizer that counts for max_prompt_length."
    )
    max_prompt_length: PositiveInt | None = Field(
        None, description="Longer prompts (tokens) are removed; null = none."
    )
    output_path: str = Field(description="JSONL file to write.")

    @rule
    def a_length_needs_a_tokenizer(self) -> str | None:
        """`tokenizer` and `max_prompt_length` go together."""
        if (self.tokenizer is None) != (self.max_prompt_length is None):
            given, lacking = "tokenizer", "max_prompt_length"
            if self.tokenizer is None:
                given, lacking = lacking, given
            return f"{given} without {lacking}: set both, to remove over-long prompts, or neither"
        return None
