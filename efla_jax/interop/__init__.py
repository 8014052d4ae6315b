"""Other libraries' checkpoint layouts."""
