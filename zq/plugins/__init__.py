"""Bridges into other libraries; each module is imported only when its library is."""
