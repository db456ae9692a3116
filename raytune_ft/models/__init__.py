"""Craft that several rooms need, once: loading, chat encoding, segment attention, collation, scoring, generation."""
