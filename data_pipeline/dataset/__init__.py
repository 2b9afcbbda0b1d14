"""What goes out: token shards, the manifest that lists them, publishing and reading."""
