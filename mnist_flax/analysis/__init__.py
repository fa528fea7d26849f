"""What a trained network is worth: evaluation, reports, statistics."""
