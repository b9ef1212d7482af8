"""State dict ⇄ artifact: joins the code (`coding`) and the files (`format`)."""
