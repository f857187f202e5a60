"""What every rank does at this moment, and what to do when nothing moves any more: docs/hangs.md."""
