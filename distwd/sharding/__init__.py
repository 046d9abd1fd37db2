"""Who holds what. The only room that talks to other ranks."""
