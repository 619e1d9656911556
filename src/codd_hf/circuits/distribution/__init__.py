"""The coupled distribution over tokens, and what it is composed of."""
