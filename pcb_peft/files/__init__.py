"""The border: strangers' files are read here, and nowhere else, into names, shapes and values that can be relied on."""
