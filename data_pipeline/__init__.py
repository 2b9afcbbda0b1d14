"""Raw text to token shards, through datatrove; never imports torch."""
