from longwave.evals.page import Done, escape_markdown, fence


def test_markdown_escapes():
    assert escape_markdown("a|b *c* <d> & `e`\n[f]") == r"a\|b \*c\* &lt;d&gt; &amp; \`e\` \[f\]"
    assert escape_markdown(Done("a|b")) == "a|b"
    assert fence(["echo ```"]) == "````sh\necho ```\n````"
