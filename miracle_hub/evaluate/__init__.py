"""What a compressed model answers, beside another one or beside the truth."""
