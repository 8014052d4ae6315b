"""The commands of `efla`, each a function of its arguments: they read options, call the library, print."""
