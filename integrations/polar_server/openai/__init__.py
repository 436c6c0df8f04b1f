"""The wire format of OpenAI's API: bodies into requests of the engine, answers into JSON and server-sent events."""
