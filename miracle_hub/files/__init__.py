"""Files as a disk has them: outputs whole or not at all, safetensors containers. Knows no format of ours."""
