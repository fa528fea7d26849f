"""What keeps a run safe: its folder, checkpoints, log, signals, console and processes."""
