"""The command `polar`: a thin layer over the library. Other parts add commands through `polar_sdk.commands`."""
