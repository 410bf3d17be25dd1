"""Rules and configurations of each family."""
