"""Shipped with the package: small hosts trained by us, the task `reviews`, and the modules that made them."""
