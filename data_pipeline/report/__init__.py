"""What became of every document: numbers, pictures and samples of one preparation, as one HTML file."""
