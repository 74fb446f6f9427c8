"""Files of weights: reading and writing, what they say of their model, the 2021 release's format, the Hub's folders."""
