"""What lets a method, a space or a calibration be one file: names, and options read from signatures."""
