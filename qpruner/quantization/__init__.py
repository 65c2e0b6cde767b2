"""Pack layers in number formats, bank them, and assemble mixed models from the bank."""
