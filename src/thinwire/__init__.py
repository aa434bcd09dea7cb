"""thinwire: fine-tune every parameter of a language model across clients, over kilobytes."""

__version__ = "0.1.0"
