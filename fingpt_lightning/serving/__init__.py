"""A server of one model and its adapters, with the routes of OpenAI's API."""
