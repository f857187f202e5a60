"""From a prompt column to the text that is tokenised: plain text, or chat messages through a template."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from apo_megatron.config.data import PromptFormat
from apo_megatron.data.rows import describe
from apo_megatron.errors import ConfigError, DataError


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"chat_template=true, but the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat "
            "template (base models often have none): set chat_template=false and prompts of text, or put a "
            "chat_template.jinja beside its tokenizer_config.json"
        )


def prompt_text(prompt: Any, form: PromptFormat, tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    """The text of a prompt, up to where the answer begins.

    With ``form.chat_template`` the tokenizer's template of the messages (a text is one message of the user),
    which brings its special tokens as text; without it the text itself. Raises DataError naming ``place``
    for anything that is neither text nor chat messages, for messages without a template, and where the
    template refuses them.
    """
    messages = as_messages(prompt, form.prompt_field, place)
    if not form.chat_template:
        if not isinstance(prompt, str):
            raise DataError(
                f"{place}: column {form.prompt_field!r} is a list of chat messages, which need "
                "chat_template=true: set that, or write text"
            )
        return prompt
    try:
        # A sandbox of jinja2: the template is the tokenizer's, and reaches nothing but the messages.
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(
            f"{place}: the tokenizer's chat template refuses the messages in {form.prompt_field!r} "
            f"({error}): mend them, or set chat_template=false"
        ) from error
    assert isinstance(text, str)
    return text


def as_messages(prompt: Any, column: str, place: str) -> list[dict[str, Any]]:
    """Chat messages; a text is one of the user. Raises DataError for anything else."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise DataError(
            f"{place}: column {column!r} is {describe(prompt)}, expected a string or a list of chat messages"
        )
    for number, message in enumerate(prompt, start=1):
        keys = ("role", "content")
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in keys):
            raise DataError(
                f"{place}: message {number} in column {column!r} is {describe(message)}, expected an object "
                'with the texts "role" and "content"'
            )
    return prompt
