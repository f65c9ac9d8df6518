"""Files of repositories on the hub: names, downloads, uploads, and one mapping from the hub's errors to uhl's."""
