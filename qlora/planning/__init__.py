"""What will run and why: every `auto` becomes a value with a reason."""
