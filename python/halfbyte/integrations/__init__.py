"""Where halfbyte meets other libraries, one module each. None is imported before its library is."""
