"""Serving an export: the real server's command, a client for its two interfaces, and a double to try the client on."""
