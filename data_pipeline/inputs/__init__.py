"""What comes in: raw files of many formats as documents, dealt into pieces of work."""
