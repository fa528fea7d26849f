"""What keeps a run alive: its folder, checkpoints, log, signals, processes."""
