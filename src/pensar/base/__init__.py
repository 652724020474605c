"""What every room stands on: configuration, stages and their artifacts, ranks, files, progress, errors."""
