"""The front, against engines that speak the real protocol over real sockets."""
