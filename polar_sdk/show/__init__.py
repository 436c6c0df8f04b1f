"""Output for people: tables, progress. Shared by the commands and by billing."""
