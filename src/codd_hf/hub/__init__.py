"""Repositories on the Hub and on disk: names, what they hold, cards, pushing."""
