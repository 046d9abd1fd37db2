"""The decay rules, and the class that rules of one's own are made of."""
