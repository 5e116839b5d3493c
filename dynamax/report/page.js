"use strict";
// Without this script all answers are shown. With it, the full model's and those of the policy that was chosen.
for (const select of document.querySelectorAll("select[data-answers]")) {
  const answers = document.getElementById(select.dataset.answers).querySelectorAll("[data-point]");
  const show = () => {
    for (const answer of answers) {
      answer.hidden = answer.dataset.point !== "full" && answer.dataset.point !== select.value;
    }
  };
  select.closest(".chooser").hidden = false;
  select.addEventListener("change", show);
  show();
}
