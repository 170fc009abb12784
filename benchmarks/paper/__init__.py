"""The runs of the papers, on the papers' data: what they published, repeated with this library."""
