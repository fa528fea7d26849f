"""From any picture to framed digits."""
