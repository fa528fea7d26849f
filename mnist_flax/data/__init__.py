"""From a dataset's name to batches on the device."""
