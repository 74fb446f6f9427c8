"""The commands: a module each, with its options, messages and exit status; ``raftmlp --help`` lists them."""
