"""What people see: tables, progress. Shared by the commands and by billing."""
