"""Who holds what: pieces, the exchange, owners, printing."""
