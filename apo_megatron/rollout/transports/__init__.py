"""The ways in which weights travel to SGLang servers."""
