"""eptransport inside other libraries, one module each. Importing one imports the library that it is for."""
