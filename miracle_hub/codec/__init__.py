"""State dict ⇄ repository: joins the code (`coding`) and the files (`format`)."""
