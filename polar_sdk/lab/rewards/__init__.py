"""What a program does on a prompt, measured once and kept."""
