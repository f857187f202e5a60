"""What ``apo-doctor`` looks at. A check returns findings, and raises for none of them."""
