"""Quickstart: a small LLaVA from scratch, trained in several ways from one common start, compared on full images."""
