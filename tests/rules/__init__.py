"""The pure rules of the program: tables of cases, without files, network or clock."""
