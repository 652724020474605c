"""Text: documents, conversations and samples, the tokenizer, the chat format both ways, and packing."""
