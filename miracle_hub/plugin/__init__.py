"""The transformers plug-in: plain `from_pretrained` meets payloads and gets weights."""
